// The collective of a single rank: its sum is its own, so there is nothing to do. The model has no `if (single)`.

import type { Collective } from './collective.js';

export const localCollective: Collective = {
  name: 'local',
  begun: 0,
  async allReduce() {},
  async gather(send, gathered) {
    gathered.set(send);
  },
  limit() {},
  pending: () => null,
  close() {},
};
