import { describe, expect, it } from 'vitest';
import { pause } from '../../src/engine/signals.js';

describe('waiting while nothing runs', () => {
  it.each(['SIGINT', 'SIGTERM', 'SIGHUP'] as const)(
    'ends at once with %s, which is given back',
    async (signal) => {
      const start = performance.now();
      const waiting = pause(60_000);
      process.kill(process.pid, signal);
      await expect(waiting).rejects.toMatchObject({ code: 'TP_INTERRUPTED', exitCode: 130 });
      expect(performance.now() - start).toBeLessThan(5000);
      expect(process.listenerCount(signal)).toBe(0);
    },
  );

  it('ends when time is up', async () => {
    const start = performance.now();
    await pause(100);
    expect(performance.now() - start).toBeGreaterThan(90);
    expect(process.listenerCount('SIGHUP')).toBe(0);
  });
});
