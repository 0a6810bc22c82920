"""How a hook ends a job: web UIs swallow what hooks raise, and go on to an ordinary picture."""

from __future__ import annotations

from typing import Any

from fastapi import HTTPException

from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.webui.job import Job, Processed

# What the host calls on `p` next, outside the hooks whose exceptions it swallows (modules/processing.py):
# before sampling (`init` 921, `sample` 989), and after it (`save_samples` 1034, infotext of each picture 751).
NEXT_STEPS = ("init", "sample", "save_samples", "get_token_merging_ratio")


class RefusedJob(LayerDiffuseError, HTTPException):
    """The page shows its name and text; the API answers HTTP 422 with the text as `detail`."""

    def __init__(self, error: LayerDiffuseError) -> None:
        HTTPException.__init__(self, status_code=422, detail=str(error))

    def __str__(self) -> str:
        return str(self.detail)


RefusedJob.__name__ = "LayerDiffuse"


def end(p: Job, error: Exception, processed: Processed | None = None) -> None:
    """Make the job end with `error` at its next step. processed: what it made, where its last step is over."""
    p.layerdiffuse_error = raised = refused(error)

    def end_job(*args: Any, **kwargs: Any) -> Any:
        raise raised

    for step in NEXT_STEPS:
        setattr(p, step, end_job)
    if processed is not None:
        processed.js = end_job  # asked for by page and API alike, when all is done


def raise_late(p: Job) -> None:
    """What ended the job, where the web UI took none of its next steps: ersatz has made infotexts and files by then."""
    if error := getattr(p, "layerdiffuse_error", None):
        raise error


def refused(error: Exception) -> Exception:
    return RefusedJob(error) if isinstance(error, LayerDiffuseError) else error
