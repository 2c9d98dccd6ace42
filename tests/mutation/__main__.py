"""Mutation testing: make one small wrong change to the code, and check that a test fails.

python tests/mutation                       start or continue in the background
python tests/mutation --foreground PATH...  run the mutants of some files or folders
python tests/mutation --again               also run survivors without a judgement again
python tests/mutation --report              write tests/mutation/report.md
python tests/mutation --sample              run the sample of continuous integration
python tests/mutation --choose-sample       choose a new sample from the mutants that were caught
"""

import argparse
import subprocess
import sys
from pathlib import Path

from copies import ROOT, STATE


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="mutation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="*", help="files or folders (default: all packages)")
    parser.add_argument("--count", type=int, help="try this many mutants, spread over all packages")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--stale", action="store_true",
                        help="do not measure changed test files again")  # fmt: skip
    parser.add_argument("--foreground", action="store_true")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--choose-sample", action="store_true")
    asked = parser.parse_args()
    if asked.sample:
        import sample

        return sample.check(asked.workers)
    if asked.choose_sample:
        import sample

        sample.choose()
        return 0

    import line_map
    import report
    import session

    if asked.report:
        print(report.write(session.all_mutants()))
        return 0
    if not asked.foreground:
        STATE.mkdir(exist_ok=True)
        with open(STATE / "log", "a", encoding="utf-8") as log:
            subprocess.Popen(
                [sys.executable, str(Path(__file__).parent), "--foreground", *sys.argv[1:]],
                cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        print("running in the background; see .mutate/log, and `make mutate-report` at any time")
        return 0
    if not asked.stale:
        line_map.measure(asked.workers)
    session.run(session.all_mutants(asked.paths)[: asked.count], asked.workers, asked.again)
    return 0


if __name__ == "__main__":
    sys.exit(main())
