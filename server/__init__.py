"""The coordinator: invites, collects, aggregates, evaluates, and never sees a patient."""
