"""Commands that measure and print figures. Each ends with one line that sums up, and fails where a floor is missed."""
