"""How the system is brought up: the command line, the simulation, identities."""
