"""Leaves that gpt.py and the scripts use where they serve; they import nothing of ours."""
