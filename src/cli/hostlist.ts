// Slurm's short forms: `n[001-003,007],gpu-[1-2]-[a,b]` for hosts, `2(x3),1` for tasks per node.

import { fail } from '../errors.js';

/** More hosts than this are a mistake or an attack on memory. */
const MOST_HOSTS = 65_536;

/** The hosts of a list, in order; zero padding stays. TP_LAUNCHER when it is malformed. */
export function expandHostlist(list: string): string[] {
  const refuse = (why: string) => fail('TP_LAUNCHER', 'Slurm', `host list ${JSON.stringify(list)}: ${why}`);
  const hosts: string[] = [];
  for (const item of splitOutside(list)) {
    if (!item) throw refuse('an empty name');
    if (/[[\]]/.test(item.replace(/\[[^[\]]*\]/g, ''))) throw refuse('a bracket without its partner');
    let names = [''];
    for (const [, text, ranges] of item.matchAll(/([^[\]]+)|\[([^[\]]*)\]/g)) {
      const tails = text !== undefined ? [text] : expandRanges(ranges!, refuse);
      if (hosts.length + names.length * tails.length > MOST_HOSTS)
        throw refuse(`more than ${MOST_HOSTS} hosts`);
      names = names.flatMap((name) => tails.map((tail) => name + tail));
    }
    hosts.push(...names);
  }
  return hosts;
}

/** `001-003,007` -> 001, 002, 003, 007 */
function expandRanges(ranges: string, refuse: (why: string) => Error): string[] {
  return ranges.split(',').flatMap((range) => {
    const match = /^(\d+)-(\d+)$/.exec(range);
    if (!match) {
      if (!/^[\w.]+$/.test(range)) throw refuse(`range ${JSON.stringify(range)}`);
      return [range];
    }
    const [from, to] = [Number(match[1]), Number(match[2])];
    if (to < from) throw refuse(`range ${range} runs backwards`);
    if (to - from >= MOST_HOSTS) throw refuse(`more than ${MOST_HOSTS} hosts`);
    const width = match[1]!.length;
    return Array.from({ length: to - from + 1 }, (_, i) => String(from + i).padStart(width, '0'));
  });
}

/** Splits at commas that stand outside brackets. */
function splitOutside(list: string): string[] {
  return list.split(/,(?![^[]*\])/);
}

/** Tasks of each node: `2(x3),1` -> 2, 2, 2, 1. TP_LAUNCHER. */
export function expandTasks(tasks: string): number[] {
  return tasks.split(',').flatMap((item) => {
    const match = /^(\d{1,6})(?:\(x(\d{1,6})\))?$/.exec(item);
    if (!match || Number(match[2] ?? 1) > MOST_HOSTS)
      throw fail('TP_LAUNCHER', 'Slurm', `tasks per node ${JSON.stringify(tasks)} cannot be read`);
    return Array<number>(Number(match[2] ?? 1)).fill(Number(match[1]));
  });
}
