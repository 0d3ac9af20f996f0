"""What importing the vocabulary loads, and what it must not."""

import subprocess
import sys
from pathlib import Path

HEAVY = {
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "ray",
    "boto3",
    "botocore",
    "huggingface_hub",
    "accelerate",
    "numpy",
    "alembic",
    "psycopg",
}
ROOT = Path(__file__).parents[3]


def test_the_ledger_loads_nothing_heavy():
    paths = (path.relative_to(ROOT) for path in (ROOT / "jobs").rglob("*.py") if path.stem != "__init__")
    paths = (path for path in paths if "migrations" not in path.parts)  # Alembic runs those
    modules = sorted(".".join(path.with_suffix("").parts) for path in paths)
    assert "jobs.ledger.store" in modules
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in run.stdout.split()}
    assert {"jobs", "sqlalchemy", "yaml"} <= loaded
    assert not loaded & HEAVY
