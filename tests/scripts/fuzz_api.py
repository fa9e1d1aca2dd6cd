"""Requests made up from the API's own description, sent to a server on a scripted model.

    python tests/scripts/fuzz_api.py [--max-examples N] [...]       (make test-fuzz)

Arguments are those of `schemathesis run`. All its checks are made but one: a request that fits the description may be
refused all the same, because a description cannot say what fits the context or which grammars there are.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from served_models import make_served, serving

from normistral.server.auth import Keys
from normistral.server.limits import ServerLimits

KEY = "a-key-for-the-fuzzer"
LIMITS = ServerLimits(new_tokens=20, grace_s=0.2)


def main() -> int:
    arguments = sys.argv[1:] or ["--max-examples", "200"]
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_served(Path(scratch) / "model")
        for keys in (Keys(), Keys({KEY: "fuzzer"})):
            with serving(folder, LIMITS, keys) as url:
                command = [
                    *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json"),
                    *("--exclude-checks", "positive_data_acceptance", "--continue-on-failure"),
                    *("--request-timeout", "30"),
                    *(("--header", f"Authorization: Bearer {KEY}") if keys else ()),
                    *arguments,
                ]
                code = subprocess.run(command, cwd=scratch, check=False).returncode
                if code:
                    return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
