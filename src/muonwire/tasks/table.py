"""The tasks, a line each: what is imported here is known to the command line by its ``name``."""

from muonwire.tasks.text import TextSettings as TextSettings
from muonwire.tasks.vision import VisionSettings as VisionSettings
