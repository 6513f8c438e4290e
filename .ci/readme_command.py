"""Print the README's command line marked `<!-- NAME -->`, so that CI runs what the README says."""

import re
import sys
from pathlib import Path

readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
match = re.search(rf"<!-- {re.escape(sys.argv[1])} -->\s*```(?:bash|sh)\n(.*?)```", readme, re.DOTALL)
if match is None:
    sys.exit(f"README.md has no command marked <!-- {sys.argv[1]} -->")
print(match.group(1))
