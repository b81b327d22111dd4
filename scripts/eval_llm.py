"""`eval_llm.py` of the root, under the path that some guides give: python scripts/eval_llm.py --weight full_sft"""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    runpy.run_path(str(ROOT / "eval_llm.py"), run_name="__main__")
