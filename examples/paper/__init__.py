"""The paper's experiments. They use the scripts beside this folder, which find each other by their own folder."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
