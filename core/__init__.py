"""The shared core: layouts, masks, schedules, caches and the one decode loop."""
