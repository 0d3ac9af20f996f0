"""Fire drills: the command line with one fault in it, to see that parity stops it.

    python -m tests.drills flip-byte merge --base ... --adapter ... --to ...
    python -m tests.drills halve-scaling merge --base ... --adapter ... --to ...

`flip-byte` inverts one byte in the middle of the first job's first merged shard, after it was written and hashed.
`halve-scaling` halves the scaling of the first job's adapter in the merge, and nowhere else.
"""

import dataclasses
import functools
import sys

import workers.unit.unit
from cluster.cli import main
from workers.merging.merge import run_pass


def flip_byte(base, quantized, weights, jobs, context, **options):
    result = run_pass(base, quantized, weights, jobs, context, **options)
    plan, directory = jobs[0].plan, jobs[0].directory
    shard = plan.output.shards[0]
    offset = (len(shard.header) + shard.num_bytes) // 2
    with (directory / shard.name).open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))
    sys.stderr.write(f"drill: flipped byte {offset} of {shard.name}\n")
    return result


def halve_scaling(base, quantized, weights, jobs, context, **options):
    first = jobs[0]
    deltas = {name: dataclasses.replace(delta, scaling=delta.scaling / 2) for name, delta in first.plan.deltas.items()}
    first.part = dataclasses.replace(first.plan, deltas=deltas)
    sys.stderr.write(f"drill: halved the scaling of {first.id}\n")
    result = run_pass(base, quantized, weights, jobs, context, **options)
    first.part = None
    return result


DRILLS = {
    "flip-byte": flip_byte,
    "halve-scaling": halve_scaling,
}


def start(drill: str) -> None:
    workers.unit.unit.run_pass = functools.wraps(run_pass)(DRILLS[drill])


if __name__ == "__main__":
    start(sys.argv.pop(1))
    sys.exit(main())
