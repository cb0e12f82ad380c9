// The kinds of flag: how the text of a flag or of its TP_RUN_* variable becomes a checked value.

/** A flag's meaning. `read` answers undefined for a text that is not what `expected` says. */
export interface Flag<T> {
  kind: 'value' | 'list' | 'switch';
  group: string;
  describe: string;
  /** Completes "expected … for --flag but received …". */
  expected: string;
  fallback: T;
  /** The default in words, where the value itself does not say it. */
  shown?: string | undefined;
  read(text: string): T | undefined;
}

type About<T> = [group: string, describe: string, fallback: T, shown?: string];

/** A whole number from `min` to `max`. */
export function whole<T extends number | null>(
  min: number,
  max: number,
  ...[group, describe, fallback, shown]: About<T>
): Flag<T | number> {
  return {
    kind: 'value',
    group,
    describe,
    expected: `a whole number from ${min} to ${max}`,
    fallback,
    shown,
    read: (text) => wholeNumber(text, min, max),
  };
}

/** A number from `min` to `max`; `open` leaves `min` itself out. */
export function real(
  min: number,
  max: number,
  open: boolean,
  ...[group, describe, fallback, shown]: About<number>
): Flag<number> {
  return {
    kind: 'value',
    group,
    describe,
    expected: `a number ${open ? 'above' : 'from'} ${min} ${max === Infinity ? 'up' : `to ${max}`}`,
    fallback,
    shown,
    read(text) {
      if (!/^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(text)) return undefined;
      const value = Number(text);
      return value < min || value > max || !Number.isFinite(value) || (open && value === min)
        ? undefined
        : value;
    },
  };
}

/** Whole numbers, `2,17,5`, each from `min` to `max`. */
export function wholes(
  min: number,
  max: number,
  ...[group, describe, fallback, shown]: About<readonly number[]>
): Flag<readonly number[]> {
  return {
    kind: 'value',
    group,
    describe,
    expected: `whole numbers from ${min} to ${max} with commas between them`,
    fallback,
    shown: shown ?? fallback.join(','),
    read(text) {
      const values = text.split(',').map((part) => wholeNumber(part, min, max));
      return values.every((v) => v !== undefined) ? values : undefined;
    },
  };
}

/** One of a few words. */
export function choice<const W extends string>(
  words: readonly W[],
  ...[group, describe, fallback, shown]: About<W>
): Flag<W> {
  return {
    kind: 'value',
    group,
    describe,
    expected: `one of ${words.join(', ')}`,
    fallback,
    shown,
    read: (text) => words.find((word) => word === text),
  };
}

/** Any text but the empty one: names and paths. */
export function text(...[group, describe, fallback, shown]: About<string | null>): Flag<string | null> {
  return {
    kind: 'value',
    group,
    describe,
    expected: 'a name or path',
    fallback,
    shown,
    read: (value) => value || undefined,
  };
}

/** A text that may be given several times. */
export function texts(group: string, describe: string): Flag<readonly string[]> {
  return {
    kind: 'list',
    group,
    describe,
    expected: 'a text',
    fallback: [],
    read: (value) => [value],
  };
}

/** On or off; its variable says true or false. */
export function toggle(group: string, describe: string): Flag<boolean> {
  return {
    kind: 'switch',
    group,
    describe,
    expected: 'true or false',
    fallback: false,
    read: (value) => (value === 'true' ? true : value === 'false' ? false : undefined),
  };
}

/** Digits only: "1e3", "0x10" and " 7" are refused, and so is what a double cannot hold. */
export function wholeNumber(text: string, min: number, max: number): number | undefined {
  const value = /^\d{1,15}$/.test(text) ? Number(text) : Number.NaN;
  return value >= min && value <= max ? value : undefined;
}
