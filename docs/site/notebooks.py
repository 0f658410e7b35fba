"""A hook of MkDocs: every notebook in docs/ is run when the site is built, and becomes a page with what its cells put out."""

import ast
import base64
import contextlib
import html
import io
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Run each notebook and add its page."""
    from mkdocs.structure.files import File

    for file in [f for f in files if f.src_uri.endswith(".ipynb") and f.abs_src_path]:
        path = Path(str(file.abs_src_path))
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            text = to_markdown(path)
        files.append(File.generated(config, f"{file.src_uri.removesuffix('.ipynb')}.md", content=text))
    return files


def to_markdown(path: Path, names: dict[str, Any] | None = None) -> str:
    """The notebook as a page: Markdown as it is, code in a block, and what it puts out below.

    The cells are plain Python, run in the current folder.

    Args:
        path: of the .ipynb file.
        names: what the cells see, and what they add to. Default: nothing.
    """
    names = {} if names is None else names
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        elif cell["cell_type"] == "code":
            parts += [f"```python\n{source}\n```", *run(source, names)]
    title, *rest = parts
    where = (
        f"This page is the notebook [{path.name}]({path.name}); its cells were run when the page was made."
    )
    return "\n\n".join([title, where, *rest]) + "\n"


def run(source: str, names: dict[str, Any]) -> list[str]:
    """Runs a cell; what it prints and the value of its last expression, as Markdown."""
    body = ast.parse(source).body
    last = body[-1] if body and isinstance(body[-1], ast.Expr) else None
    printed = io.StringIO()
    value = None
    with contextlib.redirect_stdout(printed):
        exec(compile(ast.Module(body[:-1] if last else body, []), "cell of a notebook", "exec"), names)
        if last:
            value = eval(compile(ast.Expression(last.value), "cell of a notebook", "eval"), names)
    text = printed.getvalue()
    return [*([output(text)] if text else []), *([] if value is None else [shown(value)])]


def shown(value: Any) -> str:
    """A value as a notebook shows it: a picture, or its text."""
    if hasattr(value, "_repr_png_"):
        data = base64.b64encode(value._repr_png_()).decode()
        return f"![what the cell shows](data:image/png;base64,{data})"
    return output(repr(value))


def output(text: str) -> str:
    """Text that a cell put out."""
    return f'<pre class="output">{html.escape(text.rstrip())}</pre>'
