// The collective of a single rank: its sum is its own, so there is nothing to do. The model has no `if (single)`.

import type { Collective } from './collective.js';

export function localCollective(): Collective {
  let next = 1;
  return {
    name: 'local',
    get next() {
      return next;
    },
    async allReduce() {
      next++;
    },
    async gather(send, gathered) {
      next++;
      gathered.set(send);
    },
    limit() {},
    pending: () => null,
    close() {},
  };
}
