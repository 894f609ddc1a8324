"""What we recommend: functions from a resolved Run to something that trains, exports or demonstrates."""
