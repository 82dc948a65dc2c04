"""The exceptions of wsi_gradcam.

Every error a user can cause is a `WsiGradcamError` and also the built-in that a caller would catch. Messages
say what was given, what was expected and how to mend it, on one line.
"""

from __future__ import annotations


class WsiGradcamError(Exception):
    """Any error that wsi_gradcam raises on purpose."""


class ConfigError(WsiGradcamError, ValueError):
    """A setting or a command line that cannot be carried out."""


class SlideError(WsiGradcamError):
    """A slide that cannot be used; the message names it."""


class SlideNotFoundError(SlideError, FileNotFoundError):
    """No file at the slide's path."""


class SlideFormatError(SlideError, ValueError):
    """The file is not a slide that a reader knows, or is damaged beyond opening."""


class SlideAccessError(SlideError, ConnectionError):
    """A remote slide that cannot be reached, or may not be read."""


class MppError(SlideError, ValueError):
    """The slide's micrometres per pixel are missing or make no sense."""


class SlideReadError(SlideError, OSError):
    """A region of an opened slide could not be decoded."""


class SlideMemoryError(SlideError, RuntimeError):
    """A slide on which workers died, mostly for lack of memory."""


class StainError(SlideError, ValueError):
    """Tissue whose stain cannot be measured, and so not be normalised."""


class AnnotationError(WsiGradcamError, ValueError):
    """A mask or a file of annotations that cannot be used; the message names it."""


class ModelError(WsiGradcamError, ValueError):
    """A model that cannot be loaded, or does not behave as its specification says."""


class LayerError(ModelError):
    """No layer to explain, or a named layer that cannot be tapped."""


class EngineError(ModelError):
    """An engine that is not there, or cannot run the model."""


class TargetError(WsiGradcamError, ValueError):
    """A target that the model does not have."""


class StoreError(WsiGradcamError, OSError):
    """The output folder cannot be written or read."""


class ResultError(WsiGradcamError, ValueError):
    """A folder that holds no results, or results that are not there yet."""


class UnknownNameError(ResultError, LookupError):
    """A slide or channel that a result does not have."""


class ResumeError(WsiGradcamError, ValueError):
    """The output folder holds results of another model, slide or configuration, or another run is at work there."""


class TileError(WsiGradcamError, LookupError):
    """A tile that the viewer's page cannot ask for: there is none."""


class NotShownError(WsiGradcamError, LookupError):
    """A slide, patch or column that the viewer is asked for and that the results do not have."""


class OutsideError(WsiGradcamError, PermissionError):
    """A path or a link that leads out of the results."""


class RangeError(WsiGradcamError, ValueError):
    """A Range header that is not answered."""


class WorkerError(WsiGradcamError, RuntimeError):
    """The cluster cannot do the work: no worker, or one that died too often on the same task."""


class StoppedError(WsiGradcamError, RuntimeError):
    """The run was told to stop before all was done."""


def one_line(error: BaseException) -> str:
    """The error's message on one line, with its type in front when it is not one of ours.

    >>> one_line(MppError("a.svs: no mpp"))
    'a.svs: no mpp'
    >>> one_line(RuntimeError("two\\nlines"))
    'RuntimeError: two lines'
    """
    text = " ".join(str(error).split())
    return text if isinstance(error, WsiGradcamError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
