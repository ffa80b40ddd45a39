"""`python -m tests.cluster.lab [COMMAND...]`: a lab for as long as COMMAND (else a shell) runs on its head node."""

import subprocess
import sys

from tests.cluster.lab.lab import Lab, install, why_not

install()
if reason := why_not():
    sys.exit(f"no lab here: {reason}")
with Lab() as lab:
    code = subprocess.run(lab.inside("head", sys.argv[1:] or ["bash"]), env=lab.environment, check=False).returncode
sys.exit(code)
