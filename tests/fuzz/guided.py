"""Cases that atheris makes, which goes by the lines of code that they reach; its finds are libFuzzer's.

One file of a case has the bytes that it makes. The promise is the same; of what engine.py watches, time,
memory and death by a signal are libFuzzer's to see.
"""

import sys
import tempfile
from pathlib import Path

from fuzz import engine


def run(name: str, seconds: float, seed: int, folder: Path) -> int:
    """Try new cases of a target for some time, up to the first find, which a folder keeps; gives a status."""
    import atheris

    with atheris.instrument_imports(include=["ssd", "yaml", "json", "xml", "PIL"]):
        module = engine.target(name)
        seeds = module.seeds()
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as home:
        begin = Path(home, "seeds")
        begin.mkdir()
        for number, case in enumerate(seeds):
            for i, file in enumerate(sorted(case)):
                (begin / f"{number}-{i}").write_bytes(bytes([number, i]) + case[file])

        def one(data: bytes) -> None:
            if len(data) < 2:
                return
            case = seeds[data[0] % len(seeds)]
            file = sorted(case)[data[1] % len(case)]
            with tempfile.TemporaryDirectory(dir=home) as place:
                case = case | {file: data[2:]}
                engine.write(case, Path(place), Path("/outside"))
                module.promise(case, Path(place))

        options = [f"-max_total_time={seconds:.0f}", f"-seed={seed + 1}", f"-artifact_prefix={folder}/"]
        options += ["-max_len=65536", "-rss_limit_mb=6000", f"-timeout={engine.SECONDS:.0f}"]
        atheris.Setup([sys.argv[0], *options, str(begin)], one)
        atheris.Fuzz()  # ends the process
    return 0
