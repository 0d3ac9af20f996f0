"""The driving: settings, driver and scheduler, the pool of workers and Ray below it, the console, the commands."""
