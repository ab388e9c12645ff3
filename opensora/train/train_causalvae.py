"""The training command under its first name: `causalvae train`, run from a clone with nothing installed."""

import sys
from pathlib import Path

if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 - who has an older one should read this, not a SyntaxError
        sys.stderr.write("error: causalvae needs Python 3.11 or newer\n")
        sys.exit(2)
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

    from causalvae.cli import main

    sys.exit(main("train", sys.argv[1:]))
