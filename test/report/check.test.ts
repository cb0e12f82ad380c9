import { describe, expect, it } from 'vitest';
import { details, verdictLine } from '../../src/report/check.js';
import type { AxisResult, CheckResult } from '../../src/report/schema.js';

const at = { sequence: 2, position: 9, layer: 3, stage: 'attention' };
const axis: AxisResult = {
  axis: 'tp',
  name: 'tp=2 against tp=1',
  equal: true,
  compared: { tokens: 512, rows: 512, values: 134217728, outputs: 27648 },
  differing: { sequences: 0, cells: 0 },
  first: null,
  distance: null,
  disagreement: null,
};
const passed = {
  tp: 2,
  verdict: 'pass' as CheckResult['verdict'],
  level: 'layers' as const,
  prompts: 8,
  max_tokens: 64,
  axes: [axis],
  control: { planted: { ...at, rank: 1 }, found: { ...at, what: 'output' as const }, detected: true },
};

describe('the verdict of a check', () => {
  it('says what is equal, how much was compared, and that the control was found', () => {
    expect(verdictLine(passed)).toBe(
      'PASS tp=2 is bit-identical to tp=1: 8 prompts x 64 tokens, 512 logit rows, 134 217 728 values, ' +
        '0 differing [control: detected at layer 3 attention]',
    );
  });

  it('says where the runs part and how far', () => {
    const different: AxisResult = {
      ...axis,
      equal: false,
      differing: { sequences: 3, cells: 40 },
      first: { ...at, what: 'output' },
      distance: { maxDelta: 0.031, maxUlp: 40000, topFlips: 1 },
    };
    const failed = { ...passed, verdict: 'fail' as const, axes: [different] };
    expect(verdictLine(failed)).toBe(
      'FAIL tp=2 differs from tp=1 in 3/8 prompts; first at sequence 2, position 9, layer 3 attention',
    );
    expect(details(failed)).toContain('logits max|delta| 3.1e-2 (40 000 ULP), top-1 flips 1\n');
    expect(details(failed)).toMatch(/^tp .* differs at sequence 2, position 9, layer 3 attention$/m);
  });

  it('names the axis when it is not the ranks that make the difference', () => {
    const batch: AxisResult = {
      ...axis,
      axis: 'batch',
      name: 'each prompt alone',
      equal: false,
      differing: { sequences: 1, cells: 1 },
      first: { ...at, layer: -1, stage: 'logits', what: 'logits' },
    };
    expect(verdictLine({ ...passed, verdict: 'fail', axes: [axis, batch] })).toBe(
      'FAIL tp=2 differs (batch: each prompt alone) in 1/8 prompts; first at sequence 2, position 9, logits',
    );
  });

  it('proves nothing when the control was not found, or found elsewhere', () => {
    const lost = { ...passed, verdict: 'control-missed' as const };
    expect(verdictLine({ ...lost, control: { ...passed.control, found: null, detected: false } })).toBe(
      'CONTROL MISSED: the fault planted at sequence 2, position 9, layer 3 attention was not found; nothing is proved',
    );
    const elsewhere = { ...at, layer: 4, what: 'output' as const };
    const control = { ...passed.control, found: elsewhere, detected: false };
    expect(verdictLine({ ...lost, control })).toContain(
      'was not found, but a difference at sequence 2, position 9, layer 4',
    );
    expect(details({ ...lost, control })).toMatch(
      /^control .* found at sequence 2, position 9, layer 4 attention$/m,
    );
  });
});
