"""Many machines: replicas behind Ray Serve, batch jobs on Ray Data."""
