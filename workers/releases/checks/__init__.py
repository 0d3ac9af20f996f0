"""Whether a checkpoint can be loaded where it is deployed: rules of the engines, held against headers and small files.

No weight is read. A topic is a file: its rules as data, and what looks for them. Extend: add a rule to `RULES` of a
topic with who refuses it and where that was seen, yield it from `find`, and break a good release in a test
(`tests/unit/workers/releases/checks`).
"""
