"""What the report gathers, and how its page is made."""
