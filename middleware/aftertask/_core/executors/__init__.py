"""Where the function of a run is called: on the event loop, in a thread, in a process."""
