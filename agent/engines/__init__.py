"""Engine processes: started, watched, put to sleep, woken and stopped.

It imports cache, devices, core and the agent's ground."""
