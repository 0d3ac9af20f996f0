"""The driving: settings, scheduler, Ray pool, driver, metrics and the command line."""
