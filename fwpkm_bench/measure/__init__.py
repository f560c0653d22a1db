"""How time, memory, ceilings and the machine itself are measured."""
