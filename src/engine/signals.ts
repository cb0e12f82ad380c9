// The signals that end a run in order.

import { fail } from '../errors.js';

const END_SIGNALS = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const;

/** Calls `act` on each of them, in place of the end that they would bring; until what this returns is called. */
export function onEndSignal(act: (signal: NodeJS.Signals) => void): () => void {
  for (const signal of END_SIGNALS) process.on(signal, act);
  return () => {
    for (const signal of END_SIGNALS) process.off(signal, act);
  };
}

/** `promise`, or TP_INTERRUPTED at the first signal: for waiting while there is nothing that needs an orderly end. */
export async function interruptible<T>(promise: Promise<T>): Promise<T> {
  let off!: () => void;
  const interrupted = new Promise<never>((_, reject) => {
    off = onEndSignal((signal) => reject(fail('TP_INTERRUPTED', signal)));
  });
  try {
    return await Promise.race([promise, interrupted]);
  } finally {
    off();
  }
}

/** Waits; TP_INTERRUPTED at the first signal. */
export async function pause(ms: number): Promise<void> {
  let timer: NodeJS.Timeout | undefined;
  const over = new Promise<void>((resolve) => {
    timer = setTimeout(resolve, ms);
  });
  try {
    await interruptible(over);
  } finally {
    clearTimeout(timer);
  }
}
