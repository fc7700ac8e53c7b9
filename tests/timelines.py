"""Timelines of an engine, made by hand."""

from common.load import EngineStep, Timeline


def timeline(steps, sent=None, arrived=None):
    """Steps as (when each ended, requests that got a token)."""
    return Timeline(sent=sent or {}, arrived=arrived or {}, steps=[EngineStep(at, 0.0, count) for at, count in steps])
