"""The folders with weight files: what they have, and how they get what they have not."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lib_layerdiffuse.weights.files import Report, compare, is_file, size_of
from lib_layerdiffuse.weights.part import part_of
from lib_layerdiffuse.weights.released import ASSETS
from lib_layerdiffuse.weights.transfer import Transfer


@dataclass(frozen=True)
class WeightLibrary:
    """The folders that may hold weight files, searched in order; downloads go into the first."""

    folders: Sequence[Path]

    def find(self, file: str) -> Path | None:
        """The file in the first folder that has it and lets it be seen."""
        return next((path for folder in self.folders if is_file(path := folder / file)), None)

    def obtain(self, file: str, report: Report) -> Path:
        """The file, downloaded first if no folder has it. One that is there is the user's and never replaced.

        Raises LayerDiffuseError; logs a warning where the file has other bytes than the released one.
        """
        path = self.find(file)
        if path is None:
            return self.transfer(file, report).run()
        compare(path, report)
        return path

    def transfer(self, file: str, report: Report) -> Transfer:
        """Its download, yet to be run."""
        return Transfer(ASSETS[file], self.folders[0], report)

    def received(self, file: str) -> int:
        """Bytes of a download of the file that is not finished."""
        return size_of(part_of(self.folders[0], file))
