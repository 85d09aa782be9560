"""What callers and files give: checked before anything is worked out."""
