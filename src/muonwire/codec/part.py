"""What the parts of a pipeline share: a name, options, and a textual form."""

from dataclasses import fields
from typing import ClassVar


class Part:
    """One named part of a pipeline; its subclasses are frozen dataclasses whose fields are its options."""

    name: ClassVar[str]

    def __str__(self) -> str:
        options = [
            f"{f.name}={getattr(self, f.name)}"
            for f in fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) is not None
        ]
        return f"{self.name}({', '.join(options)})" if options else self.name
