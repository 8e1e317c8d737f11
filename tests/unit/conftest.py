"""What every unit test keeps."""

from hypothesis import HealthCheck, settings

# Its own time limits are for a machine that does nothing else.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")
