"""Engine processes: started, watched, put to sleep, woken and stopped."""
