"""Plan and pass: what a merge will do, what does it, and the proof of what it wrote."""
