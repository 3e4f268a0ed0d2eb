"""The independent checker: it searches what intake made for anything that looks like an identity.

It shares no code with `client.intake.deid`: a mistake there is not repeated here.
"""
