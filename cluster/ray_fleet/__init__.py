"""Workers as Ray actors, the session they run in, and the metrics they show. The only room that knows Ray."""
