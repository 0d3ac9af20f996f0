"""Adapters as other trainers write them, converted into PEFT's layout by what each of them publishes of its own."""
