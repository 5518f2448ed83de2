"""Attention as Pavlovian conditioning: keys are cues, values are outcomes, a query is a test.

Qiao, "Understanding transformers through the lens of Pavlovian conditioning" (arXiv 2508.08289).
`schedules` and `designs` say what happens to an animal, `conditioner` what it learns,
`phenomena` what classical learning theory predicts, `capacity` and `depth` how much a memory holds,
`probe` whether trained attention does the same.
"""
