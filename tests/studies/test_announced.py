"""Studies announce the phases that they have."""

from __future__ import annotations

from pathlib import Path

from heard import Heard

import wina_calib
from wina_calib.studies.bench import bench
from wina_calib.studies.diagnose import diagnose


def test_studies_announce_their_phases(calibrated: Path, text: Path) -> None:
    options = {"data": str(text), "tokens": 512}
    for study in (
        lambda heard: wina_calib.evaluate(calibrated, progress=heard, **options),
        lambda heard: diagnose(calibrated, amounts=(4,), fit_seq_len=32, progress=heard, **options),
        lambda heard: bench(str(calibrated), prompt=4, new=4, rounds=2, progress=heard),
    ):
        heard = Heard()
        study(heard)
        heard.check()
