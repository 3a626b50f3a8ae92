"""From `add_task` to the outcome. Nothing in this package imports a vendor of telemetry."""
