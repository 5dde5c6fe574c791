"""With this folder in PYTHONPATH, a script finds no matplotlib and draws no loss.png: this saves time."""

import sys

sys.modules["matplotlib"] = None
