"""What operators, agents and routers ask, a file a subject: `route_table` names each handler.

It imports the rest of scheduler/admin but `api`, which puts the handlers together."""
