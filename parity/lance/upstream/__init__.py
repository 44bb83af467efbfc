"""Capturing from a clone of bytedance/Lance: its launcher runs unmodified in a process of its own, and is watched."""
