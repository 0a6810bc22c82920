"""What outlives a job in a web UI: the weights that jobs read, and how they are downloaded."""

from __future__ import annotations

from pathlib import Path

from lib_layerdiffuse.engine.engine import Engine
from lib_layerdiffuse.engine.loaded import LoadedWeights
from lib_layerdiffuse.errors import LayerDiffuseError
from lib_layerdiffuse.methods import Family
from lib_layerdiffuse.webui.host import Host
from lib_layerdiffuse.weights.checkpoints import family_of
from lib_layerdiffuse.weights.downloads import Downloads


class Extension:
    """LayerDiffuse in one web UI."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.downloads = Downloads(host.weight_folders)
        self.engine = Engine(host.backend, LoadedWeights(self._obtain, host.backend.forget))

    def chosen_family(self, checkpoint: str | None = None) -> Family | None:
        """The kind of the checkpoint with that title, or of the chosen one, where its file tells."""
        file = self.host.checkpoint_file(checkpoint)
        return family_of(file) if file else None

    def _obtain(self, file: str) -> Path:
        """The path of a weight file; a download of it is shown and can be interrupted, as a job's."""
        with self.host.progress() as show:

            def report(text: str, fraction: float) -> None:
                if self.host.interrupted():
                    raise LayerDiffuseError(f"{text}, interrupted. The next job goes on from there.")
                show(text, fraction)

            return self.downloads.obtain(file, report)
