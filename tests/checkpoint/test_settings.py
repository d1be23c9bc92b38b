"""Settings of a checkpoint know nothing of what runs it."""

import script


def test_settings_load_nothing_of_the_runtime() -> None:
    loaded = script.run_json(
        "import json, sys; import wina_calib.checkpoint.settings; print(json.dumps(sorted(sys.modules)))",
        env={"_WINA_CALIB_COMPLETE": "1"},  # the package's face stays empty
    )
    assert "wina_calib.checkpoint.settings" in loaded
    assert [name for name in loaded if name.startswith("wina_calib.runtime")] == []
