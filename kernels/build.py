"""Builds what the `kernels` library loads: a folder for each backend, with the package and its metadata.

    python kernels/build.py                  # writes kernels/build/torch-cpu, torch-cuda, ...
    kernels benchmark ./kernels              # in the virtual environment, with kernels[benchmark]

The package is pure Python, so a build is a copy; this makes what kernel-builder makes of `build.toml`, without Nix.
After it, `kernels.get_local_kernel(Path("kernels"))` loads the package under a name of its own, beside any other.
"""

import argparse
import hashlib
import json
import shutil
import tomllib
from pathlib import Path

HERE = Path(__file__).parent


def build(out: Path) -> list[Path]:
    """Writes `out/torch-<backend>` for each backend, in place of what is there; returns these folders."""
    settings = tomllib.loads((HERE / "build.toml").read_text())
    general, endings = settings["general"], settings["torch-noarch"]["pyext"]
    name = general["name"].replace("-", "_")
    source = HERE / "torch-ext" / name
    files = sorted(path for ending in endings for path in source.rglob(f"*.{ending}"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.relative_to(source)}\n".encode() + path.read_bytes())
    built = []
    for backend in general["backends"]:
        folder = out / f"torch-{backend}"
        shutil.rmtree(folder, ignore_errors=True)
        for path in files:
            target = folder / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        metadata = {
            "id": f"_{name}_{backend}_{digest.hexdigest()[:10]}",  # the name it is imported under
            "name": general["name"],
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        built.append(folder)
    return built


def main() -> None:
    """Builds where the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "build")
    for folder in build(parser.parse_args().out):
        print(folder)


if __name__ == "__main__":
    main()
